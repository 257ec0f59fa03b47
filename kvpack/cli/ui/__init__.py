"""The page of `kvpack ui`: a video that is watched, and told what to show, while it is made. Needs Gradio."""
